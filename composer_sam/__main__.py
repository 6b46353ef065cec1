"""``python -m composer_sam`` is the ``composer-sam`` command."""

import sys

from composer_sam.commands.main import main

if __name__ == '__main__':
    sys.exit(main())
