from fused_kd.integrations.sampling import *  # noqa: F403
