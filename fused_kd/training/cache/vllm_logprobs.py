from fused_kd.training.cache import convert_vllm as convert_vllm
from fused_kd.training.vllm import read_prompt_logprobs as read_prompt_logprobs
