from fused_kd.integrations.distributed import *  # noqa: F403
