"""Every official file that data preparation reads, in one table.

  python data_prep/sources.py [KEY ...]

prints keys, releases and titles, or the addresses and licences of some. The
rows stand in `genecompass_jax/prepare/fetching/official.py`, because `genecompass prep
download` needs them where the package is installed without this folder; two
copies would drift apart. Change them there.
"""

import sys

from genecompass_jax import cli
from genecompass_jax.prepare.fetching import official

FILES = official.FILES

if __name__ == '__main__':
  sys.exit(cli.main(['prep', 'download', '--list', *sys.argv[1:]]))
