"""`python -m gptlib COMMAND` is the command line, where no `gptlib` is installed."""

from gptlib.workshop.command import main


if __name__ == "__main__":
    main()
