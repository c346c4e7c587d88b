/*
 * A PKCS #11 module that is SoftHSM, but for what the file SHIM_BEHAVIOUR says it is to do when it
 * signs: a token that is pulled, hangs, crashes, or tries what no module needs. Another behaviour is
 * that no token but "shaky" says what it is.
 *
 * SHIM_LOGINS gets a line for each C_Login, with what came of it, SHIM_ATTEMPTS one for each attempt. The process that is
 * attempted on is named in SHIM_ATTEMPTS with ".pid" after it.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define TOKEN_INFO 6
#define LOGIN 18
#define SIGN_INIT 42
#define SIGN 43

typedef unsigned long (*function)(void *, ...);
struct functions {
    unsigned char version[2];
    function call[68];
};

static struct functions ours, *softhsm;

static void append(const char *variable, const char *line)
{
    const char *path = getenv(variable);
    FILE *file = path != NULL ? fopen(path, "a") : NULL;

    if (file != NULL) {
        fprintf(file, "%s\n", line);
        fclose(file);
    }
}

static void attempt(const char *name, int result)
{
    char line[200];

    snprintf(line, sizeof line, "%s: %s", name, result < 0 ? strerror(errno) : "done");
    append("SHIM_ATTEMPTS", line);
}

static pid_t other(void)
{
    char path[4096];
    int pid = -1;
    FILE *file;

    snprintf(path, sizeof path, "%s.pid", getenv("SHIM_ATTEMPTS"));
    file = fopen(path, "r");
    if (file == NULL || fscanf(file, "%d", &pid) != 1)
        abort();
    fclose(file);
    return pid;
}

/* Also called by the control, in a process that is not confined. */
void attempt_all(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(1)};
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    struct rlimit theirs, own;
    pid_t pid = other();

    inet_pton(AF_INET, "127.0.0.1", &address.sin_addr);
    attempt("read", open("/etc/hostname", O_RDONLY));
    attempt("write", open("/tmp/keyd-shim-was-here", O_CREAT | O_WRONLY, 0600));
    unlink("/tmp/keyd-shim-was-here");
    attempt("connect", connect(fd, (struct sockaddr *)&address, sizeof address));
    attempt("limits", prlimit(pid, RLIMIT_NOFILE, NULL, &theirs) < 0
                          ? -1
                          : prlimit(pid, RLIMIT_NOFILE, &theirs, NULL));
    attempt("own limits", prlimit(0, RLIMIT_NOFILE, NULL, &own));
    attempt("signal", kill(pid, 0));
    attempt("the host", socket(AF_VSOCK, SOCK_STREAM, 0));
}

static void behaviour(char *name, size_t size)
{
    FILE *file = fopen(getenv("SHIM_BEHAVIOUR"), "r");

    name[0] = '\0';
    if (file == NULL)
        return;
    if (fgets(name, (int)size, file) == NULL)
        name[0] = '\0';
    fclose(file);
}

static unsigned long sign_init(void *session, void *mechanism, void *key)
{
    char name[32];

    behaviour(name, sizeof name);
    if (strcmp(name, "no mechanism") == 0)
        return 0x70; /* CKR_MECHANISM_INVALID */
    return softhsm->call[SIGN_INIT](session, mechanism, key);
}

static unsigned long sign(void *session, void *a, void *b, void *c, void *d)
{
    static char *const program[] = {"/bin/true", NULL};
    char name[32];

    behaviour(name, sizeof name);
    if (strcmp(name, "hang") == 0)
        for (;;)
            pause();
    if (strcmp(name, "crash") == 0)
        raise(SIGSEGV);
    if (strcmp(name, "exit") == 0)
        exit(0);
    if (strcmp(name, "pulled") == 0)
        return 0x32; /* CKR_DEVICE_REMOVED */
    if (strcmp(name, "session lost") == 0)
        return 0xB3; /* CKR_SESSION_HANDLE_INVALID */
    if (strcmp(name, "attempts") == 0)
        attempt_all();
    if (strcmp(name, "exec") == 0)
        execv(program[0], program);
    return softhsm->call[SIGN](session, a, b, c, d);
}

static unsigned long login(void *session, void *a, void *b, void *c)
{
    unsigned long result = softhsm->call[LOGIN](session, a, b, c);
    char line[20];

    snprintf(line, sizeof line, "%#lx", result);
    append("SHIM_LOGINS", line);
    return result;
}

static unsigned long token_info(void *slot, unsigned char *info)
{
    unsigned long result = softhsm->call[TOKEN_INFO](slot, info);
    char name[32];

    behaviour(name, sizeof name);
    /* What it has first is its label. */
    if (strcmp(name, "others fail") == 0 && memcmp(info, "shaky ", 6) != 0)
        return 5; /* CKR_GENERAL_ERROR */
    return result;
}

unsigned long C_GetFunctionList(struct functions **list)
{
    void *library = dlopen("/usr/lib/softhsm/libsofthsm2.so", RTLD_NOW);
    unsigned long (*get)(struct functions **);

    if (library == NULL)
        return 5;
    *(void **)&get = dlsym(library, "C_GetFunctionList");
    if (get(&softhsm) != 0)
        return 5;
    ours = *softhsm;
    ours.call[TOKEN_INFO] = (function)token_info;
    ours.call[LOGIN] = (function)login;
    ours.call[SIGN_INIT] = (function)sign_init;
    ours.call[SIGN] = (function)sign;
    *list = &ours;
    return 0;
}
