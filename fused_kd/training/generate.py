from fused_kd.training.generation import Decoding as Decoding
from fused_kd.training.generation import Generation as Generation
from fused_kd.training.generation import Generations as Generations
from fused_kd.training.generation import generate as generate
from fused_kd.training.generation import generate_to as generate_to
