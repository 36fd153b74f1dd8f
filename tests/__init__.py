"""Tests. Which devices they see is set here, before torch is imported."""

import os

if os.environ.get("MICROTRON_TEST_DEVICE", "cpu") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the pools and for programs with train.device=auto
else:
    # torch.cuda.is_available would otherwise start CUDA, which no fork could use then.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
