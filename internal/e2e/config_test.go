package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
)

// configFile writes a configuration with one listener and one pool of command;
// extra goes to the top, poolExtra into the pool.
func configFile(t *testing.T, command []string, extra, poolExtra string) string {
	t.Helper()
	quoted := make([]string, len(command))
	for i, c := range command {
		quoted[i] = fmt.Sprintf("%q", c)
	}
	return writeFile(t, "ktlsvisor.toml", fmt.Sprintf(`self_signed = true
%s
[[listener]]
address = "127.0.0.1:0"

[[pool]]
name = "default"
command = [%s]
workers = 2
%s
`, extra, strings.Join(quoted, ", "), poolExtra))
}

func writeFile(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(tempDir(t), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// What is wrong with a configuration is said before anything is started: file,
// line, key and remedy, by `check` and by `run` in the same words, exit code 1.
func TestBadConfigIsRefusedWithPlaceAndRemedy(t *testing.T) {
	program := ktlsvisor(t)
	const pool = "[[pool]]\nname = \"p\"\ncommand = [\"/bin/true\"]\n"
	for name, c := range map[string]struct {
		text string
		line int
		want []string // besides file and line
	}{
		"unknown key": {
			text: "self_signed = true\nhandshake_timeuot = \"1s\"\n[[listener]]\naddress = \"127.0.0.1:0\"\n" + pool,
			line: 2, want: []string{"handshake_timeuot", "handshake_timeout"},
		},
		"missing certificate": {
			text: "[[listener]]\naddress = \"127.0.0.1:0\"\ncert = \"/nowhere/cert.pem\"\nkey = \"/nowhere/key.pem\"\n" + pool,
			line: 3, want: []string{"listener[0].cert", "/nowhere/cert.pem"},
		},
		"two listeners on one address": {
			text: "self_signed = true\n[[listener]]\naddress = \"127.0.0.1:7443\"\n[[listener]]\naddress = \"127.0.0.1:7443\"\n" + pool,
			line: 5, want: []string{"listener[1].address", "127.0.0.1:7443"},
		},
		"worker program missing": {
			text: "self_signed = true\n[[listener]]\naddress = \"127.0.0.1:0\"\n[[pool]]\nname = \"p\"\ncommand = [\"/nowhere/worker\"]\n",
			line: 6, want: []string{"pool[0].command", "/nowhere/worker"},
		},
		"no TOML": {
			text: "self_signed = true\n[[listener\n", line: 2, want: []string{},
		},
	} {
		t.Run(name, func(t *testing.T) {
			file := writeFile(t, "c.toml", c.text)
			want := append(c.want, fmt.Sprintf("%s:%d:", file, c.line))
			check := visor.Run(program, "check", "-c", file)
			run := visor.Run(program, "--admin", filepath.Join(tempDir(t), "a.sock"), "run", "-c", file)
			for what, r := range map[string]visor.Result{"check": check, "run": run} {
				text := r.Stdout + r.Stderr
				if r.Code != 1 {
					t.Errorf("%s: want exit code 1: %s", what, r)
				}
				for _, w := range want {
					if !strings.Contains(text, w) {
						t.Errorf("%s does not say %q: %s", what, w, r)
					}
				}
				if !strings.Contains(text, "; ") {
					t.Errorf("%s names no remedy: %s", what, r)
				}
			}
		})
	}
}

// Two units cannot have one address, and the second says which.
func TestAddressInUseIsSaidAndEndsTheSecondUnit(t *testing.T) {
	u := start(t, visor.Options{})
	f := u.fleet(5)
	second := start(t, visor.Options{NotReady: true, Args: []string{"--listen", u.Addr, "--self-signed", "--", echo(t)}})
	if code := second.ExitCode(patience); code != 1 {
		t.Errorf("exit code %d, want 1", code)
	}
	if log := second.Log(); !strings.Contains(log, u.Addr) || !strings.Contains(log, "address already in use") {
		t.Errorf("the log does not say what is in use:\n%s", log)
	}
	if left := second.Processes(); len(left) > 0 {
		t.Errorf("processes %v are left", left)
	}
	f.intact()
}

// A second unit on the same admin socket is refused; the first keeps it.
func TestAdminSocketInUseEndsTheSecondUnit(t *testing.T) {
	u := start(t, visor.Options{})
	f := u.fleet(5)
	r := visor.Run(ktlsvisor(t), "--admin", u.Admin.Path(), "run", "--listen", "127.0.0.1:0", "--self-signed", "--", echo(t))
	if r.Code != 1 || !strings.Contains(r.Stderr, u.Admin.Path()) {
		t.Errorf("want exit code 1 and the socket's name: %s", r)
	}
	u.run(0, "upgrade")
	u.settled(5)
	f.intact()
}
