from fused_kd.training.cache import top_k_log_probs as top_k_log_probs
from fused_kd.training.cache import write_cache as write_cache
from fused_kd.training.cache import write_lists as write_lists
