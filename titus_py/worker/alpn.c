/*
 * Chooses the application protocol of a connection (ALPN, RFC 7301).
 *
 * Run by workers, called by OpenSSL, on the list that a client sent, which is hostile. The server's
 * order holds. In C, because a callback in Python needs a page of memory that is writable and
 * executable.
 */

#include <Python.h>

#include <stdbool.h>
#include <stddef.h>
#include <string.h>

/* What SSL_CTX_set_alpn_select_cb(3) expects: go on, or the alert no_application_protocol. */
#define ACCEPTED 0
#define REFUSED 2

/* Both lists are RFC 7301's: each name after one octet with its length. */
static bool has(const unsigned char *list, size_t octets, const unsigned char *name)
{
	for (size_t at = 0; at < octets; at += 1 + (size_t)list[at])
		if (octets - at > name[0] && memcmp(list + at, name, 1 + (size_t)name[0]) == 0)
			return true;
	return false;
}

/* Chooses the first of our names that the client offers. A name of 0 octets ends our list. */
static int choose(const void *ssl, const unsigned char **chosen, unsigned char *length,
		  const unsigned char *offered, unsigned int octets, const void *ours)
{
	(void)ssl;
	for (const unsigned char *name = ours; name[0] != 0; name += 1 + (size_t)name[0]) {
		if (has(offered, octets, name)) {
			*chosen = name + 1;
			*length = name[0];
			return ACCEPTED;
		}
	}
	return REFUSED;
}

static struct PyModuleDef definition = {
	.m_base = PyModuleDef_HEAD_INIT,
	.m_name = "titus_py.worker.alpn",
	.m_size = 0,
};

PyMODINIT_FUNC PyInit_alpn(void);
PyMODINIT_FUNC PyInit_alpn(void)
{
	PyObject *module = PyModule_Create(&definition);
	PyObject *address = module != NULL ? PyLong_FromVoidPtr((void *)choose) : NULL;
	if (address == NULL || PyModule_AddObjectRef(module, "CALLBACK", address) < 0)
		Py_CLEAR(module);
	Py_XDECREF(address);
	return module;
}
