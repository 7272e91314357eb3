from fused_kd.integrations.labels import LABEL_PAD as LABEL_PAD
from fused_kd.training.collate import Collator as Collator
from fused_kd.training.collate import check_rows as check_rows
from fused_kd.training.collate import padding_id as padding_id
from fused_kd.training.data import WITH_INPUT as WITH_INPUT
from fused_kd.training.data import WITHOUT_INPUT as WITHOUT_INPUT
from fused_kd.training.prompts import PROMPTS as PROMPTS
from fused_kd.training.prompts import PromptTemplate as PromptTemplate
from fused_kd.training.prompts import Rows
from fused_kd.training.prompts import concatenate as concatenate
from fused_kd.training.prompts import encode_prompts as encode_prompts
from fused_kd.training.prompts import get_prompt as get_prompt
from fused_kd.training.prompts import render_sample as render_sample
from fused_kd.training.prompts import tokenize_directions as tokenize_directions
from fused_kd.training.prompts import tokenize_pairs as tokenize_pairs
from fused_kd.training.prompts import tokenize_texts as tokenize_texts
from fused_kd.training.prompts import training_texts as training_texts

PairDataset = Rows
