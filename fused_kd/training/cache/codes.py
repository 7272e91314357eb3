from fused_kd.training.codes import DTYPES as DTYPES
from fused_kd.training.codes import decode as decode
from fused_kd.training.codes import encode as encode
from fused_kd.training.codes import id_dtype as id_dtype
