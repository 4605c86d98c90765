"""The package that SGLANG_EXTERNAL_MODEL_PACKAGE names: model classes by architecture."""
