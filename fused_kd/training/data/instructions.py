from fused_kd.training.data import Instruction as Instruction
from fused_kd.training.data import load_instructions as load_instructions
from fused_kd.training.prompts import tokenize_instructions as tokenize_instructions
