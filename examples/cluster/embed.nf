// Embedding with Nextflow: a process for each shard, and one that joins them.
// Not yet run: Nextflow was not at hand.
//
//   nextflow run examples/cluster/embed.nf --input proteins.fasta --output vectors.parquet --shards 32 \
//     --options "-m esm2_t33_650M_UR50D --fast"

nextflow.enable.dsl = 2

params.input = null
params.output = 'vectors.parquet'
params.shards = 8
params.options = ''

process SHARD {
    errorStrategy 'retry'
    maxRetries 3
    cpus 4

    input:
    path fasta
    each number

    output:
    path '*.shard-*'

    script:
    """
    OMP_NUM_THREADS=${task.cpus} protea embed ${fasta} -o "${params.output}" --shard ${number}/${params.shards} ${params.options}
    """
}

process MERGE {
    publishDir '.', mode: 'copy'

    input:
    path shards

    output:
    path "${params.output}*"

    script:
    """
    protea merge "${params.output}"
    """
}

workflow {
    shards = SHARD(file(params.input), Channel.of(1..params.shards))
    MERGE(shards.collect())
}
