/* Loaded before a program by LD_PRELOAD: answers the questions for the processor's features that only_avx2.py has
   replaced by an illegal instruction, as a processor with AVX2 and without AVX-512, AVX-VNNI and AMX would. */

#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <stddef.h>
#include <ucontext.h>

#define FEATURES 7               /* the group of answers that tells of AVX-512 */
#define EBX_OF_AVX512 0xdc230000 /* F, DQ, IFMA, PF, ER, CD, BW, VL */
#define ECX_OF_AVX512 0x00005842 /* VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ */
#define EDX_OF_AVX512 0x03c0010c /* 4VNNIW, 4FMAPS, VP2INTERSECT, FP16, and AMX */

static void answer(int number, siginfo_t *info, void *context) {
    (void)info;
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *instruction = (const unsigned char *)registers[REG_RIP];
    if (instruction[0] != 0x06 || instruction[1] != 0xa2) {
        signal(number, SIG_DFL); /* not ours: it will end the program */
        return;
    }
    unsigned leaf = registers[REG_RAX], part = registers[REG_RCX], a, b, c, d;
    __cpuid_count(leaf, part, a, b, c, d);
    if (leaf == FEATURES) {
        a = 0; /* no parts but the first, which tell of BF16, AVX-VNNI and AVX10 */
        b = part ? 0 : b & ~EBX_OF_AVX512;
        c = part ? 0 : c & ~ECX_OF_AVX512;
        d = part ? 0 : d & ~EDX_OF_AVX512;
    }
    registers[REG_RAX] = a;
    registers[REG_RBX] = b;
    registers[REG_RCX] = c;
    registers[REG_RDX] = d;
    registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void install(void) {
    struct sigaction action = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGILL, &action, NULL);
}
