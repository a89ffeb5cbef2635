"""The papers' training recipes: functions that edit a configuration in place."""
