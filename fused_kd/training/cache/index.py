from fused_kd.training.teacher_cache import FORMAT as FORMAT
from fused_kd.training.teacher_cache import INDEX as INDEX
from fused_kd.training.teacher_cache import read_index as read_index
