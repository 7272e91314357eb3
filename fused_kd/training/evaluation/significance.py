from fused_kd.training.score import ALPHA as ALPHA
from fused_kd.training.score import METRICS as METRICS
from fused_kd.training.score import Comparison as Comparison
from fused_kd.training.score import paired_bootstrap as paired_bootstrap
from fused_kd.training.score import significant_over_seeds as significant_over_seeds
