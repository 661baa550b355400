package vmtest

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const modulesDep = `kernel/net/tls/tls.ko.xz:
kernel/crypto/gcm.ko.xz: kernel/crypto/ghash-generic.ko.xz kernel/crypto/base.ko.xz
kernel/crypto/ghash-generic.ko.xz: kernel/crypto/base.ko.xz
kernel/crypto/base.ko.xz:
kernel/arch/x86/crypto/aesni-intel.ko: kernel/crypto/base.ko.xz
`

func TestModuleOrder(t *testing.T) {
	m, err := parseModulesDep(strings.NewReader(modulesDep))
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name                         string
		want, without, load, missing []string
	}{
		{name: "what is needed comes first", want: []string{"tls", "gcm"}, load: []string{"tls", "base", "ghash_generic", "gcm"}},
		{name: "nothing twice", want: []string{"gcm", "base", "gcm"}, load: []string{"base", "ghash_generic", "gcm"}},
		{name: "dash or underscore", want: []string{"aesni_intel"}, load: []string{"base", "aesni_intel"}},
		{name: "not there", want: []string{"tls", "ccm"}, load: []string{"tls"}, missing: []string{"ccm"}},
		{name: "left out", want: []string{"tls", "base"}, without: []string{"tls"}, load: []string{"base"}, missing: []string{"tls"}},
		{name: "left out with what needs it", want: []string{"gcm", "tls"}, without: []string{"ghash-generic"}, load: []string{"tls"}, missing: []string{"gcm"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			files, missing := m.order(tc.want, tc.without)
			var names []string
			for _, f := range files {
				names = append(names, moduleName(f))
			}
			if !slices.Equal(names, tc.load) || !slices.Equal(missing, tc.missing) {
				t.Errorf("loads %q, misses %q; want %q, %q", names, missing, tc.load, tc.missing)
			}
		})
	}
}

func TestModulesDepRefusesGarbage(t *testing.T) {
	if _, err := parseModulesDep(strings.NewReader("no colon here\n")); err == nil {
		t.Error("no error")
	}
}

// entry is one member of a cpio archive, as read back by readArchive.
type entry struct {
	mode uint64
	data string
}

// readArchive reads a newc archive strictly: every name and every file must start
// at a multiple of four.
func readArchive(t *testing.T, b []byte) (entries map[string]entry, rest []byte) {
	t.Helper()
	entries = map[string]entry{}
	off := 0
	take := func(n int) []byte {
		if off+n > len(b) {
			t.Fatalf("the archive ends at %d, within a member", len(b))
		}
		p := b[off : off+n]
		off += n
		return p
	}
	for {
		head := take(110)
		if string(head[:6]) != "070701" {
			t.Fatalf("no header at %d: %q", off-110, head[:6])
		}
		field := func(i int) (v uint64) {
			if _, err := fmt.Sscanf(string(head[6+8*i:14+8*i]), "%08X", &v); err != nil {
				t.Fatal(err)
			}
			return v
		}
		name := take(int(field(11)))
		take((4 - off%4) % 4)
		data := take(int(field(6)))
		take((4 - off%4) % 4)
		if name[len(name)-1] != 0 {
			t.Fatalf("name %q has no end", name)
		}
		if n := string(name[:len(name)-1]); n == "TRAILER!!!" {
			break
		} else if _, twice := entries[n]; twice {
			t.Errorf("%s is there twice", n)
		} else {
			entries[n] = entry{field(1), string(data)}
		}
	}
	return entries, b[off:]
}

func TestArchive(t *testing.T) {
	dir := t.TempDir()
	host := filepath.Join(dir, "sub", "host-file")
	if err := os.Mkdir(filepath.Dir(host), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(host, []byte("from the host"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(host, 0o640); err != nil { // whatever the umask
		t.Fatal(err)
	}
	var buf bytes.Buffer
	a := newArchive(&buf)
	a.file("/init", 0o755, host)
	a.bytes("etc/deep/er/x", 0o600, []byte("123"))
	a.bytes("etc/empty", 0o644, nil)
	a.device("dev/console", 0o600, 5, 1)
	a.link("bin/sh", "busybox")
	a.tree("/src", dir)
	if err := a.close(); err != nil {
		t.Fatal(err)
	}
	if buf.Len()%512 != 0 {
		t.Errorf("%d bytes: another archive could not follow", buf.Len())
	}
	entries, rest := readArchive(t, buf.Bytes())
	if strings.Trim(string(rest), "\x00") != "" {
		t.Errorf("after the end comes %q", rest)
	}
	for name, want := range map[string]entry{
		"init":              {0o100755, "from the host"},
		"etc":               {0o040755, ""},
		"etc/deep":          {0o040755, ""},
		"etc/deep/er":       {0o040755, ""},
		"etc/deep/er/x":     {0o100600, "123"},
		"etc/empty":         {0o100644, ""},
		"bin":               {0o040755, ""},
		"bin/sh":            {0o120777, "busybox"},
		"dev":               {0o040755, ""},
		"dev/console":       {0o020600, ""},
		"src":               {0o040755, ""},
		"src/sub":           {0o040755, ""},
		"src/sub/host-file": {0o100640, "from the host"},
	} {
		if got, ok := entries[name]; !ok || got != want {
			t.Errorf("%s: %o %q, want %o %q", name, got.mode, got.data, want.mode, want.data)
		}
		delete(entries, name)
	}
	for name := range entries {
		t.Errorf("%s was not asked for", name)
	}
}

func TestArchiveKeepsFirstError(t *testing.T) {
	a := newArchive(io.Discard)
	a.file("x", 0o644, filepath.Join(t.TempDir(), "absent"))
	a.bytes("y", 0o644, []byte("y"))
	if err := a.close(); !os.IsNotExist(err) {
		t.Errorf("close: %v", err)
	}
}
