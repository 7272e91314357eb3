from fused_kd.training.reading import Row as Row
from fused_kd.training.reading import json_value as json_value
from fused_kd.training.reading import reading as reading
from fused_kd.training.reading import sound as sound
from fused_kd.training.reading import text_fault as text_fault
from fused_kd.training.reading import text_lines as text_lines
