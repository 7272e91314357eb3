from fused_kd.training.data import SIZES as SIZES
from fused_kd.training.data import toy_corpus as toy_corpus
