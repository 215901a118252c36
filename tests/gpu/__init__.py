"""What runs on a GPU only (`make test-gpu`); ops' contracts are checked where they stand, on its backends as well."""

import os

PLATFORMS = "LEVERAGE_TEST_PLATFORMS"
"""Variable with which tests are told of a GPU, such as cuda,cpu."""

HERE = PLATFORMS in os.environ
"""Whether tests run on one."""
