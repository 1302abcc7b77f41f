"""The command line of a process that a launcher starts: `accelerate launch -m mmcompress.cli`."""

from mmcompress.cli import main

if __name__ == "__main__":
    main()
