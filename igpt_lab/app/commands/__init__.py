"""The commands, in files that are named after the folders they call; `options` says how a command is declared."""
