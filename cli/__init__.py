"""`amperage`, the operator's command. Sub-commands are imported when they are called, so that each starts fast."""
