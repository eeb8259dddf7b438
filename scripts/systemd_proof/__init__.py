"""scripts/prove-systemd: what phid.service and scripts/install promise, under a real systemd."""
