"""gpg-train from the command line to the ranks; the dry run; the doctor."""
