"""Real Node-RED and Home Assistant with the examples of config/, against a real broker and phid."""
