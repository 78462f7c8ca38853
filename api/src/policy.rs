//! The kinds of `policy.weft.dev/v1alpha1` as people write them in YAML.
