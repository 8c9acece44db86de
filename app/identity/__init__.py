"""Who a credential stands for: API keys, signed tokens; and the log of what admins do."""
