from fused_kd.training.data import LANGUAGES as LANGUAGES
from fused_kd.training.data import Pair as Pair
from fused_kd.training.data import language_name as language_name
from fused_kd.training.data import load_directions as load_directions
from fused_kd.training.data import load_pairs as load_pairs
from fused_kd.training.data import parse_direction as parse_direction
