"""ONNX Runtime GenAI: imported here alone, after its telemetry has been switched off."""

from __future__ import annotations

import os

# The one switch for all of it, read once: at the import.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime_genai as og

__all__ = ["og"]
