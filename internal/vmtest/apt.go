package vmtest

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// systemKeyring is the file of Debian's package debian-archive-keyring.
const systemKeyring = "usr/share/keyrings/debian-archive-keyring.gpg"

// apt is a private configuration of apt for one release: own sources, lists and
// cache, so that neither needs root nor touches what the machine has configured
// (its proxies are still honoured). Every package is checked against the keyring.
type apt struct {
	dir  string // everything is below
	conf string
	rel  release
}

// newApt writes the configuration below dir. archive and security are mirrors;
// security may be "".
func newApt(dir string, rel release, archive, security, keyring string) (*apt, error) {
	for _, d := range []string{"lists/partial", "archives/partial"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	var list strings.Builder
	stanza := func(uri string, suites []string) {
		if uri == "" || len(suites) == 0 {
			return
		}
		fmt.Fprintf(&list, "Types: deb\nURIs: %s\nSuites: %s\nComponents: main\nTargets: Packages\nArchitectures: amd64\nSigned-By: %s\n\n",
			uri, strings.Join(suites, " "), keyring)
	}
	stanza(archive, rel.archive)
	stanza(security, rel.security)
	conf := fmt.Sprintf(`Dir::Etc::sourcelist "%[1]s/apt.sources";
Dir::Etc::sourceparts "-";
Dir::Etc::preferences "-";
Dir::Etc::preferencesparts "-";
Dir::State "%[1]s";
Dir::State::lists "%[1]s/lists";
Dir::State::status "%[1]s/status";
Dir::Cache "%[1]s";
Dir::Cache::archives "%[1]s/archives";
APT::Architecture "amd64";
APT::Architectures "amd64";
APT::Sandbox::User "";
APT::Update::Error-Mode "any";
Acquire::Languages "none";
Acquire::Retries "2";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
`, dir)
	a := &apt{dir: dir, conf: filepath.Join(dir, "apt.conf"), rel: rel}
	for name, text := range map[string]string{"apt.conf": conf, "apt.sources": list.String(), "status": ""} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	return a, nil
}

func (a *apt) update(ctx context.Context) error {
	_, err := a.run(ctx, "apt-get", "update", "-q")
	return err
}

// kernelNames lists the names of all kernel packages.
func (a *apt) kernelNames(ctx context.Context) ([]string, error) {
	out, err := a.run(ctx, "apt-cache", "pkgnames", "linux-")
	return strings.Fields(out), err
}

// unpack fetches packages and unpacks them into dir; nothing is installed.
func (a *apt) unpack(ctx context.Context, dir string, packages ...string) error {
	debs, err := os.MkdirTemp(a.dir, "debs-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(debs) }()
	cmd := a.command(ctx, "apt-get", append([]string{"download", "-q"}, packages...)...)
	cmd.Dir = debs
	if _, err := runQuietly(cmd); err != nil {
		return err
	}
	files, err := filepath.Glob(filepath.Join(debs, "*.deb"))
	if err != nil {
		return err
	}
	if len(files) != len(packages) {
		return fmt.Errorf("apt-get download %s: %d files came", strings.Join(packages, " "), len(files))
	}
	for _, f := range files {
		if _, err := runQuietly(exec.CommandContext(ctx, "dpkg", "-x", f, dir)); err != nil {
			return err
		}
	}
	return nil
}

func (a *apt) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, name, append([]string{"-c", a.conf}, args...)...)
}

func (a *apt) run(ctx context.Context, name string, args ...string) (string, error) {
	return runQuietly(a.command(ctx, name, args...))
}

// runQuietly runs a command and returns what it wrote to its output; an error
// carries the last of what it said.
func runQuietly(cmd *exec.Cmd) (string, error) {
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	if err := cmd.Run(); err != nil {
		text := strings.TrimSpace(out.String() + said.String())
		if len(text) > 2000 {
			text = "…" + text[len(text)-2000:]
		}
		return "", fmt.Errorf("%s %s: %w: %s\n%s", filepath.Base(cmd.Path), verb(cmd.Args), err, complaint(text), text)
	}
	return out.String(), nil
}

// verb is the first argument of a command line that is no option, nor an option's
// file: what the command was to do.
func verb(args []string) string {
	for _, a := range args[1:] {
		if !strings.HasPrefix(a, "-") && !strings.HasPrefix(a, "/") {
			return a
		}
	}
	return ""
}

// complaint is the line of a command's output that says best why it failed: apt's
// first error, else the last line.
func complaint(text string) string {
	last := ""
	for line := range strings.Lines(text) {
		last = strings.TrimSpace(line)
		if strings.HasPrefix(last, "E: ") {
			break
		}
	}
	return last
}
