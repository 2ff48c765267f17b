"""What each verb of the `suite` command does."""
