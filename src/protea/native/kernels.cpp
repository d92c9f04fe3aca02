// Compiled once for each instruction set, which PROTEA_SET names.
