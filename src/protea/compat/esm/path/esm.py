"""``import esm`` in a process that a script has started, see ``protea.compat.esm.installing``."""

from protea.compat.esm import install

install()
