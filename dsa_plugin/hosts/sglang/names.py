"""Names by which SGLang knows what is ours."""

BACKEND = "dsa_plugin"
"""Our name among SGLang's attention backends."""
MODELS = "dsa_plugin.hosts.sglang.models"
"""The package of our model classes."""
RESOLUTION_STEP = "handle_model_specific_adjustments"
"""The step of its resolution of arguments that ours goes around."""
