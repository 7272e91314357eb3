from fused_kd.training.score import Scores as Scores
from fused_kd.training.score import Similarity as Similarity
from fused_kd.training.score import check_texts as check_texts
from fused_kd.training.score import score as score
from fused_kd.training.score import similarity as similarity
from fused_kd.training.score import translate as translate
