from fused_kd.training.teacher_cache import PARTS as PARTS
from fused_kd.training.teacher_cache import AnyRows
from fused_kd.training.teacher_cache import CachedRows as CachedRows
from fused_kd.training.teacher_cache import TeacherCache as TeacherCache
from fused_kd.training.teacher_cache import fingerprint_rows as fingerprint_rows
from fused_kd.training.teacher_cache import fingerprint_teacher as fingerprint_teacher
from fused_kd.training.teacher_cache import fingerprint_template as fingerprint_template
from fused_kd.training.teacher_cache import fingerprint_tokenizer as fingerprint_tokenizer
from fused_kd.training.teacher_cache import repetition as repetition
from fused_kd.training.teacher_cache import target_positions as target_positions

Rows = AnyRows
