"""What a researcher adds to cdslm; `lab/README.md` says what each file is for."""
