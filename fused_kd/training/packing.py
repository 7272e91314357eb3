from fused_kd.training.collate import PackingCollator as PackingCollator
