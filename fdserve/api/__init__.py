"""The endpoints: one handler module a family, over what the server shares."""
