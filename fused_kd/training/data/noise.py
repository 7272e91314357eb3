from fused_kd.training.data import misalign as misalign
