"""phid: small language and vision models on devices, asked and answered over MQTT."""

__version__ = "0.1.0"
