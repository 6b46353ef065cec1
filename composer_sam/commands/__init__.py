"""The ``composer-sam`` command line, one module per group of commands.

Every command imports what it needs when it runs: Composer and torch take seconds to import, and ``--help`` and a
mistyped command need neither.
"""
