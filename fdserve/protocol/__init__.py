"""The shapes of OpenAI's API as msgspec Structs: fields, types and ranges, and nothing else."""
