"""The one table of official files: names, addresses, releases, licences.

`genecompass prep download` reads it, and must do so where the package is
installed without the repository; so the rows stand here, and
`data_prep/sources.py`, where a reader of the repository looks for them, shows
the same rows and has none of its own. Rows only, no logic: addresses are put
together in `downloads`.

No address could be tried where this table was written, a machine without a
network. `verified` says what its pattern was read in: documentation of the
source, or, marked `used in`, public code that downloads from it; '' is an
address from memory, to be tried before it is relied on.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class OfficialFile:
  """One file, for any release of it.

  Attributes:
    key: what the command calls it.
    title: what it is.
    species: its species; '' of several or none.
    family: files of one family share their release numbers.
    release: the pinned release; '' where there is only the current one.
    url: address, with `{release}` and `{assembly}` to be filled in.
    name: local file name; '' takes that of the address.
    assemblies: (first release, name of the genome assembly), oldest first.
    format: of the content.
    licence: as the source states it.
    used_for: the step of this package that reads it.
    checksums: address of the checksums that the source publishes beside it.
    checksum_kind: `sum` (BSD checksum and blocks, as Ensembl) or `md5`.
    sha256: of the pinned release, where one is known.
    verified: what the address was checked against.
    manual: how to get it by hand, of a page that no program can fetch.
  """

  key: str
  title: str
  species: str
  family: str
  release: str
  url: str
  format: str
  licence: str
  used_for: str
  verified: str
  name: str = ''
  assemblies: tuple[tuple[int, str], ...] = ()
  checksums: str = ''
  checksum_kind: str = ''
  sha256: str = ''
  manual: str = ''


# Releases that belong together: Ensembl 113 is GENCODE 47 and M36.
ENSEMBL_RELEASE = '113'
GENCODE_HUMAN_RELEASE = '47'
GENCODE_MOUSE_RELEASE = 'M36'
HGNC_RELEASE = '2025-07-01'

_ENSEMBL = 'https://ftp.ensembl.org/pub/release-{release}'
_GENCODE = 'https://ftp.ebi.ac.uk/pub/databases/gencode'
_HGNC = 'https://storage.googleapis.com/public-download-files/hgnc'
_MGI = 'https://www.informatics.jax.org/downloads/reports'
_NCBI = 'https://ftp.ncbi.nlm.nih.gov/gene/DATA'
_RGD = 'https://download.rgd.mcw.edu/data_release'
_EPD = 'https://epd.expasy.org/ftp/epdnew'
_CENSUS = 'https://census.cellxgene.cziscience.com/cellxgene-census/v1'

_EMBL_TERMS = 'EMBL-EBI terms of use; no restriction by Ensembl'
_GENES = 'genecompass prep genes'
_PROMOTERS = 'promoter sequences of the genes'
_EDGES = 'regulatory network prior'

# (species, folder and file stem of Ensembl, assemblies by first release, genome
# file: `primary_assembly` exists only where there are alternative sequences).
# Before release 76 the names of sequence files held the release as well.
_SPECIES = (
  (
    'human',
    'Homo_sapiens',
    ((55, 'GRCh37'), (76, 'GRCh38')),
    'primary_assembly',
  ),
  (
    'mouse',
    'Mus_musculus',
    ((48, 'NCBIM37'), (68, 'GRCm38'), (103, 'GRCm39')),
    'primary_assembly',
  ),
  (
    'rat',
    'Rattus_norvegicus',
    (
      (46, 'RGSC3.4'),
      (70, 'Rnor_5.0'),
      (80, 'Rnor_6.0'),
      (105, 'mRatBN7.2'),
      (114, 'GRCr8'),
    ),
    'toplevel',
  ),
)


def _of_ensembl() -> tuple[OfficialFile, ...]:
  """Four rows a species, which differ in nothing but its name."""
  rows = []
  for species, stem, assemblies, genome in _SPECIES:
    folder = stem.lower()
    upto = [first for first, _ in assemblies[1:]] + [1 << 30]
    since_76 = tuple(
      (max(first, 76), name)
      for (first, name), end in zip(assemblies, upto)
      if end > 76
    )
    common = {
      'species': species,
      'family': 'ensembl',
      'release': ENSEMBL_RELEASE,
      'licence': _EMBL_TERMS,
    }
    rows += [
      OfficialFile(
        key=f'ensembl_gtf_{species}',
        title=f'Ensembl annotation, {species}',
        url=f'{_ENSEMBL}/gtf/{folder}/{stem}.{{assembly}}.{{release}}.gtf.gz',
        assemblies=assemblies,
        format='GTF',
        used_for=f'{_GENES}; {_PROMOTERS}',
        checksums=f'{_ENSEMBL}/gtf/{folder}/CHECKSUMS',
        checksum_kind='sum',
        verified='used in public pipelines (releases 101 to 114)',
        **common,
      ),
      OfficialFile(
        key=f'ensembl_genome_{species}',
        title=f'Ensembl genome sequence, {species}',
        url=f'{_ENSEMBL}/fasta/{folder}/dna/'
        f'{stem}.{{assembly}}.dna.{genome}.fa.gz',
        assemblies=since_76,
        format='FASTA',
        used_for=_PROMOTERS,
        checksums=f'{_ENSEMBL}/fasta/{folder}/dna/CHECKSUMS',
        checksum_kind='sum',
        verified='README of the Ensembl fasta folders; used in public '
        'pipelines',
        **common,
      ),
      OfficialFile(
        key=f'ensembl_cdna_{species}',
        title=f'Ensembl transcript sequences, {species}',
        url=f'{_ENSEMBL}/fasta/{folder}/cdna/'
        f'{stem}.{{assembly}}.cdna.all.fa.gz',
        assemblies=since_76,
        format='FASTA',
        used_for='transcript sequences',
        checksums=f'{_ENSEMBL}/fasta/{folder}/cdna/CHECKSUMS',
        checksum_kind='sum',
        verified='used in public pipelines (releases 105 and 113)',
        **common,
      ),
      OfficialFile(
        key=f'compara_{species}',
        title=f'Ensembl Compara homologies of {species} genes',
        url=f'{_ENSEMBL}/tsv/ensembl-compara/homologies/{folder}/'
        'Compara.{release}.protein_default.homologies.tsv.gz',
        name=f'{folder}.Compara.{{release}}.protein_default.homologies.tsv.gz',
        format='Compara TSV',
        used_for=_GENES,
        verified='used in public pipelines (releases 109, 112 and 116)',
        **common,
      ),
    ]
  return tuple(rows)


FILES: tuple[OfficialFile, ...] = (
  *_of_ensembl(),
  OfficialFile(
    key='gencode_gtf_human',
    title='GENCODE annotation, human, reference chromosomes',
    species='human',
    family='gencode_human',
    release=GENCODE_HUMAN_RELEASE,
    url=f'{_GENCODE}/Gencode_human/release_{{release}}/'
    'gencode.v{release}.annotation.gtf.gz',
    format='GTF',
    licence='EMBL-EBI terms of use; open access',
    used_for=f'{_GENES}; {_PROMOTERS}',
    checksums=f'{_GENCODE}/Gencode_human/release_{{release}}/MD5SUMS',
    checksum_kind='md5',
    verified='GENCODE _README.TXT (file names); the name MD5SUMS from memory',
  ),
  OfficialFile(
    key='gencode_gtf_mouse',
    title='GENCODE annotation, mouse, reference chromosomes',
    species='mouse',
    family='gencode_mouse',
    release=GENCODE_MOUSE_RELEASE,
    url=f'{_GENCODE}/Gencode_mouse/release_{{release}}/'
    'gencode.v{release}.annotation.gtf.gz',
    format='GTF',
    licence='EMBL-EBI terms of use; open access',
    used_for=f'{_GENES}; {_PROMOTERS}',
    checksums=f'{_GENCODE}/Gencode_mouse/release_{{release}}/MD5SUMS',
    checksum_kind='md5',
    verified='GENCODE _README.TXT (file names); the name MD5SUMS from memory',
  ),
  OfficialFile(
    key='hgnc',
    title='HGNC complete set, quarterly archive',
    species='human',
    family='hgnc',
    release=HGNC_RELEASE,
    url=f'{_HGNC}/archive/archive/quarterly/tsv/'
    'hgnc_complete_set_{release}.txt',
    format='HGNC complete set',
    licence='CC0 1.0',
    used_for=f'{_GENES}; gene families',
    verified='genenames.org archive page (file names); used in public '
    'pipelines (address, 2025-07-01)',
  ),
  OfficialFile(
    key='hgnc_current',
    title='HGNC complete set, current',
    species='human',
    family='hgnc_current',
    release='',
    url=f'{_HGNC}/tsv/tsv/hgnc_complete_set.txt',
    format='HGNC complete set',
    licence='CC0 1.0',
    used_for=f'{_GENES}; gene families',
    verified='used in public pipelines',
  ),
  OfficialFile(
    key='hgnc_groups',
    title='HGNC gene groups: id and name',
    species='human',
    family='hgnc_groups',
    release='',
    url=f'{_HGNC}/csv/csv/genefamily_db_tables/family.csv',
    name='hgnc_family.csv',
    format='CSV',
    licence='CC0 1.0',
    used_for='gene families',
    verified='used in public pipelines',
  ),
  OfficialFile(
    key='hgnc_group_members',
    title='HGNC gene groups: members',
    species='human',
    family='hgnc_groups',
    release='',
    url=f'{_HGNC}/csv/csv/genefamily_db_tables/gene_has_family.csv',
    name='hgnc_gene_has_family.csv',
    format='CSV',
    licence='CC0 1.0',
    used_for='gene families',
    verified='used in public pipelines (folder; file name on the older server)',
  ),
  OfficialFile(
    key='mgi_homology',
    title='MGI human-mouse homology classes',
    species='',
    family='mgi',
    release='',
    url=f'{_MGI}/HOM_MouseHumanSequence.rpt',
    format='MGI homology report',
    licence='MGI terms of use; cite MGI',
    used_for=_GENES,
    verified='used in public pipelines',
  ),
  OfficialFile(
    key='mgi_markers',
    title='MGI markers: symbols and synonyms',
    species='mouse',
    family='mgi',
    release='',
    url=f'{_MGI}/MRK_List2.rpt',
    format='MGI marker list',
    licence='MGI terms of use; cite MGI',
    used_for=_GENES,
    verified='used in public pipelines',
  ),
  OfficialFile(
    key='mgi_ensembl',
    title='MGI markers with Ensembl ids',
    species='mouse',
    family='mgi',
    release='',
    url=f'{_MGI}/MRK_ENSEMBL.rpt',
    format='MGI Ensembl report',
    licence='MGI terms of use; cite MGI',
    used_for='MGI ids of Ensembl genes',
    verified='used in public pipelines',
  ),
  OfficialFile(
    key='rgd_genes',
    title='RGD rat genes: symbols, former symbols, Entrez and Ensembl ids',
    species='rat',
    family='rgd',
    release='',
    url=f'{_RGD}/RAT/GENES_RAT.txt',
    format='RGD genes',
    licence='CC BY 4.0 (from memory; see rgd.mcw.edu); cite RGD',
    used_for=_GENES,
    verified='RGD GENES_README (content); used in public pipelines (address)',
  ),
  OfficialFile(
    key='rgd_orthologues',
    title='RGD orthologues of rat in human and mouse',
    species='',
    family='rgd',
    release='',
    url=f'{_RGD}/orthologs/RGD_ORTHOLOGS.txt',
    format='RGD orthologues',
    licence='CC BY 4.0 (from memory; see rgd.mcw.edu); cite RGD',
    used_for=_GENES,
    verified='used in public pipelines; older ones leave out orthologs/',
  ),
  *(
    OfficialFile(
      key=f'ncbi_gene_info_{species}',
      title=f'NCBI Gene names and ids, {species}',
      species=species,
      family='ncbi',
      release='',
      url=f'{_NCBI}/GENE_INFO/Mammalia/{stem}.gene_info.gz',
      format='NCBI gene_info',
      licence='public domain (NCBI)',
      used_for=_GENES,
      verified='used in public pipelines',
    )
    for species, stem, *_ in _SPECIES
  ),
  OfficialFile(
    key='ncbi_orthologues',
    title='NCBI gene orthologues, all vertebrates',
    species='',
    family='ncbi',
    release='',
    url=f'{_NCBI}/gene_orthologs.gz',
    format='NCBI gene_orthologs',
    licence='public domain (NCBI)',
    used_for=_GENES,
    verified='used in public pipelines',
  ),
  OfficialFile(
    key='homologene',
    title='NCBI HomoloGene, build 68, the last (2014)',
    species='',
    family='homologene',
    release='68',
    url='https://ftp.ncbi.nih.gov/pub/HomoloGene/build{release}/homologene.data',
    name='homologene_build{release}.data',
    format='NCBI HomoloGene',
    licence='public domain (NCBI)',
    used_for=_GENES,
    verified='used in public pipelines',
  ),
  OfficialFile(
    key='collectri',
    title='CollecTRI: signed TF to target edges, human',
    species='human',
    family='collectri',
    release='8192729',
    url='https://zenodo.org/records/{release}/files/CollecTRI_regulons.csv',
    format='CSV: source, target, weight',
    licence='see the Zenodo record; contains TRRUST and DoRothEA A',
    used_for=_EDGES,
    verified='used in public code (decoupler)',
  ),
  OfficialFile(
    key='dorothea_human',
    title='DoRothEA regulons with confidence levels, human',
    species='human',
    family='dorothea',
    release='master',
    url='https://github.com/saezlab/dorothea/raw/{release}/data/dorothea_hs.rda',
    format='R data',
    licence='GPL-3; some sources for academic use only',
    used_for=_EDGES,
    verified='used in public code',
  ),
  OfficialFile(
    key='dorothea_mouse',
    title='DoRothEA regulons with confidence levels, mouse',
    species='mouse',
    family='dorothea',
    release='master',
    url='https://github.com/saezlab/dorothea/raw/{release}/data/dorothea_mm.rda',
    format='R data',
    licence='GPL-3; some sources for academic use only',
    used_for=_EDGES,
    verified='used in public code',
  ),
  *(
    OfficialFile(
      key=f'trrust_{species}',
      title=f'TRRUST v2: TF to target edges from text, {species}',
      species=species,
      family='trrust',
      release='',
      url=f'https://www.grnpedia.org/trrust/data/trrust_rawdata.{species}.tsv',
      format='TSV: TF, target, mode, PubMed ids',
      licence='CC BY-SA 4.0 (from memory; see grnpedia.org)',
      used_for=_EDGES,
      verified='used in public code',
    )
    for species in ('human', 'mouse')
  ),
  OfficialFile(
    key='epdnew_human',
    title='EPDnew promoters, human (hg38)',
    species='human',
    family='epdnew_human',
    release='006',
    url=f'{_EPD}/H_sapiens/{{release}}/Hs_EPDnew_{{release}}_hg38.bed',
    format='BED',
    licence='free for academic and commercial use (from memory; see the site)',
    used_for='transcription start sites',
    verified='used in public code',
  ),
  OfficialFile(
    key='epdnew_mouse',
    title='EPDnew promoters, mouse (mm10)',
    species='mouse',
    family='epdnew_mouse',
    release='003',
    url=f'{_EPD}/M_musculus/{{release}}/Mm_EPDnew_{{release}}_mm10.bed',
    format='BED',
    licence='free for academic and commercial use (from memory; see the site)',
    used_for='transcription start sites',
    verified='used in public code',
  ),
  OfficialFile(
    key='census_releases',
    title='CELLxGENE Census: its releases and where they lie',
    species='',
    family='census',
    release='',
    url=f'{_CENSUS}/release.json',
    name='census_release.json',
    format='JSON',
    licence='CC BY 4.0 (cells; each data set names its own source)',
    used_for='corpus from the Census',
    verified='used in the cellxgene-census package',
  ),
  *(
    OfficialFile(
      key=f'genecompass_{size.lower()}_{species}',
      title=f'released GeneCompass cells, {size} {species}',
      species=species,
      family='genecompass',
      release='',
      url=f'https://www.scidb.cn/file?fid={fid}&mode=front',
      name=f'genecompass_{size.lower()}_{species}',
      format='Hugging Face data set of tokens',
      licence='none stated by the authors',
      used_for='comparison with the original',
      verified='README of the original repository',
      manual='open the address in a browser: it is a page that starts the '
      'download',
    )
    for size, species, fid in (
      ('50K', 'human', 'be29663db8c11f4e59aaf2d572b699fe'),
      ('50K', 'mouse', 'd27960405a1e979eadfc1a00696d5bf2'),
      ('500K', 'human', 'd46129ce14de622c4a07a1d1574dddaa'),
      ('500K', 'mouse', '65ff1a08ea3292dbbb2ca113f5041ae8'),
      ('5M', 'human', '826380b58010377e3fa8724fcf4a5fcc'),
      ('5M', 'mouse', '78e90884d7664b7baa0792c047c7aae8'),
    )
  ),
  OfficialFile(
    key='genecompass_checkpoints',
    title='released GeneCompass weights, small and base',
    species='',
    family='genecompass',
    release='',
    url='https://www.scidb.cn/en/anonymous/SUZOdk1y',
    name='genecompass_checkpoints',
    format='PyTorch weights',
    licence='none stated by the authors',
    used_for='genecompass convert pytorch',
    verified='README of the original repository',
    manual='open the address in a browser and choose a model',
  ),
)
