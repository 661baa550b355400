package config

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

var update = flag.Bool("update", false, "write golden files")

// fixtures returns a directory with the files that the configurations in testdata
// name, and makes its bin the PATH.
func fixtures(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	write := func(name string, data []byte, mode os.FileMode) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, mode); err != nil {
			t.Fatal(err)
		}
	}
	block := func(typ string, der []byte, err error) []byte {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der})
	}
	for _, prefix := range []string{"", "other-"} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		tmpl := &x509.Certificate{
			SerialNumber: big.NewInt(1),
			DNSNames:     []string{"localhost"},
			NotAfter:     time.Now().Add(time.Hour),
		}
		cert, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
		write(prefix+"cert.pem", block("CERTIFICATE", cert, err), 0o644)
		der, err := x509.MarshalPKCS8PrivateKey(key)
		write(prefix+"key.pem", block("PRIVATE KEY", der, err), 0o600)
	}
	for _, name := range []string{"worker", "bin/tool", "sub/worker"} {
		write(name, []byte("#!/bin/true\n"), 0o755)
	}
	write("plain", []byte("text\n"), 0o644)
	write("sub/plain", []byte("text\n"), 0o644)
	if t, ok := t.(*testing.T); ok {
		t.Setenv("PATH", filepath.Join(dir, "bin"))
	}
	return dir
}

// TestGolden: testdata/NAME.toml is an input with the rule it is about on its first
// line, NAME.golden the result: the configuration as JSON, or every problem.
func TestGolden(t *testing.T) {
	inputs, err := filepath.Glob("testdata/*.toml")
	if err != nil || len(inputs) == 0 {
		t.Fatalf("no inputs: %v", err)
	}
	dir := fixtures(t)
	for _, input := range inputs {
		name := strings.TrimSuffix(filepath.Base(input), ".toml")
		t.Run(name, func(t *testing.T) {
			data, err := os.ReadFile(input)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.HasPrefix(data, []byte("# rule: ")) {
				t.Error("the first line does not tell the rule")
			}
			got := result(Parse(filepath.Join(dir, name+".toml"), data))
			got = strings.ReplaceAll(strings.ReplaceAll(got, dir+"/"+name, name), dir, "$DIR")
			golden := filepath.Join("testdata", name+".golden")
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(want), got); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}
		})
	}
}

func result(c *Config, err error) string {
	if err != nil {
		return err.Error() + "\n"
	}
	b, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return err.Error()
	}
	return string(b) + "\n"
}

const good = `
[tls]
cert = "cert.pem"
key = "key.pem"
[[listener]]
address = "127.0.0.1:8443"
alpn = ["chat"]
min_version = "1.3"
client_ca = "other-cert.pem"
[[pool]]
command = ["./worker", "-v"]
workers = 3
offload = "software"
env = { A = "1" }
`

func loaded(t *testing.T) (*Config, string) {
	t.Helper()
	path := filepath.Join(fixtures(t), "ktlsvisor.toml")
	if err := os.WriteFile(path, []byte(good), 0o644); err != nil {
		t.Fatal(err)
	}
	c, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	return c, filepath.Dir(path)
}

// Files that go after the start must not keep a supervisor from coming back.
func TestStoredConfigComesBackAsItWas(t *testing.T) {
	c, dir := loaded(t)
	b, err := c.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	newer := append([]byte(`{"key_of_a_newer_version":[1],`), b[1:]...)
	for _, stored := range [][]byte{b, newer} {
		got, err := Decode(stored)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(c, got, cmpopts.IgnoreUnexported(Config{})); d != "" {
			t.Error(d)
		}
	}
	if _, err := Decode([]byte(`{"handshake_timeout":"soon"}`)); err == nil {
		t.Error("a damaged stored configuration was read")
	}
	var errs Errors
	if err := c.Validate(); !errors.As(err, &errs) || errs[0].Line != 3 || errs[0].Key != "tls.cert" {
		t.Errorf("validated again without its files: %v", err)
	}
}

func TestTLSConfig(t *testing.T) {
	c, dir := loaded(t)
	cfg, err := c.Listeners[0].TLSConfig()
	if err != nil {
		t.Fatal(err)
	}
	if cfg.MinVersion != tls.VersionTLS13 || cfg.ClientAuth != tls.RequireAndVerifyClientCert || cfg.ClientCAs == nil ||
		len(cfg.Certificates) != 1 || !cmp.Equal(cfg.NextProtos, []string{"chat"}) {
		t.Errorf("got %+v", cfg)
	}
	plain, err := (&Listener{Address: ":1", MinVersion: "1.2"}).TLSConfig()
	if err != nil {
		t.Fatal(err)
	}
	if plain.MinVersion != tls.VersionTLS12 || plain.ClientAuth != tls.NoClientCert || len(plain.Certificates) != 0 {
		t.Errorf("self-signed listener: got %+v", plain)
	}
	for _, file := range []string{"other-cert.pem", "cert.pem"} {
		if err := os.Remove(filepath.Join(dir, file)); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Listeners[0].TLSConfig(); err == nil || !strings.Contains(err.Error(), "listener 127.0.0.1:8443") {
			t.Errorf("without %s: %v", file, err)
		}
	}
}

func TestLoadErrors(t *testing.T) {
	dir := t.TempDir()
	large := filepath.Join(dir, "large.toml")
	if err := os.WriteFile(large, make([]byte, maxFile+1), 0o644); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		filepath.Join(dir, "nosuch.toml"): "nosuch.toml: cannot read the configuration: no such file or directory; name a readable file with -c",
		dir:                               ": cannot read the configuration: not a regular file; name a readable file with -c",
		large:                             "large.toml: cannot read the configuration: 1048577 bytes, the limit is 1048576; name a readable file with -c",
	} {
		if _, err := Load(path); err == nil || !strings.HasSuffix(err.Error(), want) {
			t.Errorf("got  %v\nwant …%s", err, want)
		}
	}
}

func TestFlagsAndFileGiveTheSame(t *testing.T) {
	dir := fixtures(t)
	t.Chdir(dir)
	flags, err := FromFlags(Flags{
		Listen: []string{"127.0.0.1:1", "127.0.0.1:2"}, Cert: "cert.pem", Key: "key.pem",
		Workers: 2, Offload: "kernel", Rekey: "require", Admin: "admin.sock", Command: []string{"tool", "-x"},
	})
	if err != nil {
		t.Fatal(err)
	}
	file, err := Parse("ktlsvisor.toml", []byte(`
admin = "admin.sock"
tls = { cert = "cert.pem", key = "key.pem" }
listener = [{ address = "127.0.0.1:1" }, { address = "127.0.0.1:2" }]
pool = [{ command = ["tool", "-x"], workers = 2, offload = "kernel", rekey = "require" }]`))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(file, flags, cmpopts.IgnoreUnexported(Config{})); d != "" {
		t.Errorf("-file +flags:\n%s", d)
	}
}

func TestFlagErrorsSpeakOfFlags(t *testing.T) {
	dir := fixtures(t)
	t.Chdir(dir)
	for name, tt := range map[string]struct {
		flags Flags
		want  string
	}{
		"nothing": {Flags{Workers: 1}, `--listen: there is none, so nobody could connect; add --listen host:port
COMMAND: there is no command to run; put it after --, as in -- ./worker --flag`},
		"no certificate": {Flags{Listen: []string{":1"}, Workers: 1, Command: []string{"./worker"}},
			`--listen :1: there is no certificate for this listener; add --cert FILE --key FILE, or --self-signed to try things out`},
		"pool's name": {Flags{Listen: []string{":1"}, SelfSigned: true, Workers: 1, Pool: "a b", Command: []string{"tool"}},
			`--pool: "a b" is no name of a pool; use 1 to 64 of the characters a-z A-Z 0-9 . _ -`},
		"values": {Flags{Listen: []string{":1", "localhost:1"}, SelfSigned: true, Offload: "off", Rekey: "never", Command: []string{"./nosuch"}},
			`--listen: "localhost:1" overlaps with ":1" of --listen; give each listener its own address, or keep only the one for every address
--offload: "off" leaves sessions without a record layer that can be moved, so none would survive its process; use "auto", "kernel" or "software"
--rekey: "never" is not a choice here; use "auto" or "require"
--workers: 0 workers are not possible; give a number from 1 to 1024, or leave it out for 1
COMMAND: ` + dir + `/nosuch does not exist; build or install it, or correct the path`},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := FromFlags(tt.flags)
			if err == nil {
				t.Fatal("accepted")
			}
			if d := cmp.Diff(tt.want, err.Error()); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestKernelMissing(t *testing.T) {
	dir := fixtures(t)
	t.Chdir(dir)
	file, err := Parse("k.toml", []byte(`self_signed = true
listener = [{ address = "127.0.0.1:1", pool = "b" }]
[[pool]]
name = "a"
command = ["tool"]
[[pool]]
name = "b"
command = ["tool"]
offload = "kernel"`))
	if err != nil {
		t.Fatal(err)
	}
	flags, err := FromFlags(Flags{Listen: []string{":1"}, SelfSigned: true, Workers: 1, Offload: OffloadKernel, Command: []string{"tool"}})
	if err != nil {
		t.Fatal(err)
	}
	for cfg, want := range map[*Config]string{
		file:  `k.toml:9: pool[1].offload: kernel TLS is not available here: no module; load it, or use "auto"`,
		flags: `--offload: kernel TLS is not available here: no module; load it, or use --offload auto`,
	} {
		if err := cfg.KernelMissing("no module", "load it"); !cfg.NeedsKernel() || err == nil || err.Error() != want {
			t.Errorf("needs %v: %v; want %s", cfg.NeedsKernel(), err, want)
		}
		for i := range cfg.Pools {
			cfg.Pools[i].Offload = OffloadAuto
		}
		if err := cfg.KernelMissing("no module", "load it"); cfg.NeedsKernel() || err != nil {
			t.Errorf("without kernel: needs %v, %v", cfg.NeedsKernel(), err)
		}
	}
}

func TestRekeyMissing(t *testing.T) {
	dir := fixtures(t)
	t.Chdir(dir)
	file, err := Parse("k.toml", []byte(`self_signed = true
listener = [{ address = "127.0.0.1:1", pool = "b" }]
[[pool]]
name = "a"
command = ["tool"]
rekey = "require"
[[pool]]
name = "b"
command = ["tool"]
offload = "kernel"
rekey = "require"`))
	if err != nil {
		t.Fatal(err)
	}
	flags, err := FromFlags(Flags{Listen: []string{":1"}, SelfSigned: true, Workers: 1, Offload: OffloadKernel, Rekey: RekeyRequire, Command: []string{"tool"}})
	if err != nil {
		t.Fatal(err)
	}
	for cfg, want := range map[*Config]string{
		file:  `k.toml:11: pool[1].rekey: TLS 1.3 could not be served: kernel TLS here cannot change keys: set once; it takes a new one, or use offload = "auto" for the software layer`,
		flags: `--rekey: TLS 1.3 could not be served: kernel TLS here cannot change keys: set once; it takes a new one, or use --offload auto for the software layer`,
	} {
		if err := cfg.RekeyMissing("set once", "it takes a new one"); !cfg.NeedsRekey() || err == nil || err.Error() != want {
			t.Errorf("needs %v: %v; want %s", cfg.NeedsRekey(), err, want)
		}
		for i := range cfg.Pools {
			cfg.Pools[i].Offload = OffloadAuto // TLS 1.3 goes to the software layer
		}
		if err := cfg.RekeyMissing("", ""); cfg.NeedsRekey() || err != nil {
			t.Errorf("with auto: needs %v, %v", cfg.NeedsRekey(), err)
		}
	}
}

// Whatever is in the file: an answer, no panic, and an Errors that is not empty.
func FuzzParse(f *testing.F) {
	inputs, _ := filepath.Glob("testdata/*.toml")
	for _, input := range inputs {
		data, err := os.ReadFile(input)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	dir := fixtures(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Parse(filepath.Join(dir, "fuzz.toml"), data)
		var errs Errors
		if err != nil && (!errors.As(err, &errs) || len(errs) == 0 || c != nil) {
			t.Errorf("%v, %v", c, err)
		}
		for _, e := range errs {
			if e.Problem == "" || e.Remedy == "" || e.Line > 1+bytes.Count(data, []byte("\n")) {
				t.Errorf("%+v", e)
			}
		}
		if err == nil {
			if err := c.Validate(); err != nil {
				t.Errorf("accepted, and then not: %v", err)
			}
		}
	})
}
