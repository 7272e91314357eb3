def merge(base, adapters, tokenizer, folder):
    from fused_kd.training.cycle_distill.adapters import merge as merge_

    return merge_(base, adapters, tokenizer, folder)
