"""kd: an offline teacher-logit caching pipeline for knowledge distillation."""
