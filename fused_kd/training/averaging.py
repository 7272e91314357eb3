from fused_kd.integrations.labels import *  # noqa: F403
