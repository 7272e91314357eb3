from fused_kd.training.models import LoRA as LoRA
from fused_kd.training.models import load_adapters as load_adapters
from fused_kd.training.models import with_adapters as with_adapters
