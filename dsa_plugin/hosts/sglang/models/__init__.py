"""What SGLang's model registry imports, as SGLANG_EXTERNAL_MODEL_PACKAGE: classes by architecture."""
